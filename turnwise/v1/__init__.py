"""Generated from proto/turnwise/v1 by `make proto`; never edited by hand."""
