"""Documents that are tokens already: found in their files, read through once, trained on in place."""
