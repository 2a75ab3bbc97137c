"""A head whose vocabulary is split over ranks: which rows are where, and what the ranks tell each other."""
