"""``python -m timm_dyacts``: the command line."""
from .cli import main

if __name__ == '__main__':
    main(prog='python -m timm_dyacts')
