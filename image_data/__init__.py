"""Images and the objects labelled in them, from files and data sets."""
