"""The asynchronous mode: processes that roll out, serve, record and train, and their supervisor.

    supervisor ── JSON lines ── workers · trainer        no torch in supervisor and workers
               └─ HTTP ──────── engine · gateway

`docs/forge.md` has the state machine and what each process may lose.
"""
