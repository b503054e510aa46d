"""Documents that are tokens already: found, read through once, trained on in place."""
