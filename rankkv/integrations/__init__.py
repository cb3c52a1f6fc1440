"""RankKV inside other libraries' own programs; each module imports its library when it is used, and not before."""
