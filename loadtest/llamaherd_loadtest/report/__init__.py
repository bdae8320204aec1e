"""The tuning report: one self-contained HTML file, made from verdict.json and journal.jsonl."""
