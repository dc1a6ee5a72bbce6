"""What the almanac's worlds are made of: names, values, relations and their phrasings."""
