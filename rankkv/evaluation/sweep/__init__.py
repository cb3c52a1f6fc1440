"""Sweep: a YAML file of models, tasks and settings goes in, rows and a manifest in a results folder come out."""
