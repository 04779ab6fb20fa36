"""Everything that draws: figures of a report, a study, the analysis, the attacks, and what notebooks show."""
