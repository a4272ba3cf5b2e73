"""What the runs say: results, their statistics, and the report with its figures."""
