"""The contract between user, engine and trainer; imports pydantic only.

user    -- spec.py ----------------------> engine   what is wanted
engine  -- status.py --------------------> user     how far it is
engine  -- stage.py: Task ---------------> trainer  what one attempt is to do
trainer -- stage.py: Result, Exit -------> engine   how it ended
trainer -- stage.py: Progress -----------> engine   how far it is
trainer -- artifact.py: Manifest --------> storage  what was made, of what, by whom
methods.py turns a spec into stages; every other module here is data.
"""
