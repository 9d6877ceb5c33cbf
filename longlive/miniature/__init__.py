"""The miniature: a captioned video world, an oracle that reads it, and the language of its captions."""
