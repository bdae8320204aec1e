"""What every request and answer passes, whatever its route."""
