#!/usr/bin/env python3
"""Render the cards of the zoo into model_cards/: ``timm-dyacts cards``."""
from timm_dyacts.cli.cards import main

if __name__ == '__main__':
    main(prog='model_cards.py')
