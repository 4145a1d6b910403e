"""Small models, data sets and training runs that several test files share."""
