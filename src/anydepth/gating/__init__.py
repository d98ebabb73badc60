"""Gates as data, the plan that compiles them, and the record of what ran."""
