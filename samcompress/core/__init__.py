"""core (temporary, lead)."""
