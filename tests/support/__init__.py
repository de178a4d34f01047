"""What tests share: stand-ins for checkpoints, data and the Hub, and the definitions of the operators."""
