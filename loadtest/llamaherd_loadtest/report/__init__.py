"""The tuning report: one HTML file that needs nothing else, made from verdict.json and journal.jsonl."""
