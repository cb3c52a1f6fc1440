"""Sweeps: a YAML file of models, tasks and settings goes in, a results folder with rows and a manifest comes out."""
