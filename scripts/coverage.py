#!/usr/bin/env python3
"""Convert every timm architecture with every operation, and write down what came of it: ``timm-dyacts coverage``."""
from timm_dyacts.cli.coverage import main

if __name__ == '__main__':
    main(prog='coverage.py')
