"""Messages between the front end and a worker."""
