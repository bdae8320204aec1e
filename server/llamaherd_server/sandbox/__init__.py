"""Child processes for untrusted input that might crash or block them."""
