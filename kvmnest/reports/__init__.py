"""What a run found, as values, and what is made of it: JSON, JUnit, KTAP, pages, the terminal."""
