"""`python -m metaxl_evo`: the command `metaxl-evo`."""

from metaxl_evo.cli import script

if __name__ == "__main__":
    script()
