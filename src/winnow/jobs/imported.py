"""Imported last by the process that jobs are forked from: keeps the sources of what that process holds in memory."""

from winnow.jobs.code import note_imports

note_imports()
