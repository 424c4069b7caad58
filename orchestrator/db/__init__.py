"""Everything that speaks SQL: tables, sessions and one function for each statement, on SQLite and Postgres."""
