"""Several runs compared under equal conditions."""
