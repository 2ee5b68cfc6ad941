"""The shipped configuration files, installed as ghm_d2.configs."""
