"""The stages of ``gpu_check.py``, each a program of its own.

``main`` reads the command line, ``runner`` starts one stage after the other as a child process and
ends those that hang, ``record`` keeps what they found. A stage is a module here with a function
``run``; what it says goes through ``stage.Section``. Only ``rig`` knows whether there is a GPU.
"""
