"""Other people's models and trainers; third parties are imported inside functions."""
