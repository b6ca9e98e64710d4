"""What a report is checked for, by subject; each check is a function of the report that yields what is wrong."""
