#!/usr/bin/env python3
"""Measure operators or models beside what they replace: ``timm-dyacts benchmark`` from a checkout."""
from timm_dyacts.cli.benchmark import main

if __name__ == '__main__':
    main(prog='benchmark.py')
