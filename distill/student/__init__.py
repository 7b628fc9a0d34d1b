"""The whole student: put together, evaluated, written."""
