"""Small tasks for `tjax prompt`, and how they were made; README.md beside this file says what is in them."""
