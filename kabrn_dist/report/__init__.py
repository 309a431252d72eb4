"""What a run has to tell: its log and its checkpoint → tables for people, pictures and JSON in `run/report/`."""
