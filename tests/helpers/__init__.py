"""Small models, data sets and runs that several test files share."""
