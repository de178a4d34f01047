"""Does it help? The same seeds, data and recipe for a base and its variants, and what the differences say."""
