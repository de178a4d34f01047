#!/usr/bin/env python3
"""Say which classes images may show: the command ``timm-dyacts predict``."""
from timm_dyacts.cli.predict import main

if __name__ == '__main__':
    main(prog='predict.py')
