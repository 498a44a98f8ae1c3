"""Recipes: functions that return an `Experiment`, grouped by paper. `tjax list` shows them."""
