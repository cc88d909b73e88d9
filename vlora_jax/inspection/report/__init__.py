"""One self-contained page of what inspection found: heat maps, spectra, curves, tables. No network, no framework."""
