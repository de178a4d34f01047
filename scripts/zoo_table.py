#!/usr/bin/env python3
"""Print the table of variants: ``timm-dyacts zoo``."""
from timm_dyacts.cli.zoo import main

if __name__ == '__main__':
    main(prog='zoo_table.py')
