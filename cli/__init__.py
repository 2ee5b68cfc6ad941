"""The command line `ghm`, installed as ghm_d2.cli."""
