"""A `custom_generate` repository for the Hub: what it is made of, and how it is built."""
