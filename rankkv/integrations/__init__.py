"""RankKV inside other libraries; each module imports its library only on use."""
