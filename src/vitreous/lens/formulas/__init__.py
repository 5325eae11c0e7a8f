"""Pure functions: indicators, spectra, maps, scores."""
