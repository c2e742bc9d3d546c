"""A server whose model remembers each user, behind the HTTP interface that OpenAI's clients speak.

From the ground up:

- `mind` is a model and its way of remembering. A memory is a value: learning takes one and gives the next,
  in turns of at most one chunk, so that half a lesson is never a memory. `level_mind` has a pretrained model
  with levels of deltas, `hope_mind` a Hope model, whose memory is its cache.
- `sampling`, `decoding` and `generation` write an answer token by token, in turns of one token, with keys and
  values of its own, under the memory that its user had when the request came.
- `scheduler` runs all turns on one thread, user by user in a ring. Lessons that nobody waits for get a share
  of the time (the duty cycle) while requests are there; lessons that a request waits for are its work.
- `journal` and `folder` are a user's files. What is to be learned is in the journal, flushed, before an
  answer ends. The manifest names the file of the present memory, the memories to go back to, and the last
  entry that they hold: it is replaced by a rename, which commits all of that at once. A user is deleted by
  renaming the folder; what a crash leaves of it goes at the next start.
- `user` is one user in memory: pending lessons in order, `versions` on their way to the disk. `memories`
  opens users on demand, closes those not used for longest, deletes, and replays journals at the start.
- `service` admits and answers. `schemas`, `body`, `answers`, `forms`, `memory_routes`, `guard` and `app` are
  the HTTP side; `keys` says who asks, `metrics` counts, `page.html` is for a browser; `run` binds the port
  and ends in order.

All bookkeeping lives on the event loop's thread. Numbers are made on the scheduler's thread alone; files are
written by others, from memories, which nobody changes. Only `service` and what is above it need the extra
`serve`.
"""
