-- A ledger as version 0.1 wrote it (schema version 1).
BEGIN TRANSACTION;
CREATE TABLE datasets (
	name TEXT NOT NULL, 
	PRIMARY KEY (name)
);
INSERT INTO "datasets" VALUES('clicks');
CREATE TABLE entries (
	seq INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
	at TEXT NOT NULL, 
	kind TEXT NOT NULL, 
	dataset TEXT NOT NULL, 
	run_id TEXT, 
	lease_id TEXT, 
	first_step INTEGER, 
	steps INTEGER, 
	request_id TEXT, 
	details TEXT NOT NULL, 
	FOREIGN KEY(dataset) REFERENCES datasets (name), 
	FOREIGN KEY(run_id) REFERENCES runs (run_id), 
	UNIQUE (request_id)
);
INSERT INTO "entries" VALUES(1,'2026-11-24T20:40:29.444+00:00','dataset_registered','clicks',NULL,NULL,NULL,NULL,'q1','{"delta": 1e-05, "epsilon": 8.0, "fingerprint": "first", "num_records": 10000, "unit": "record"}');
INSERT INTO "entries" VALUES(2,'2026-11-24T20:40:29.467+00:00','fingerprint_added','clicks',NULL,NULL,NULL,NULL,'q2','{"fingerprint": "second", "num_records": 12000}');
INSERT INTO "entries" VALUES(3,'2026-11-24T20:40:29.470+00:00','run_opened','clicks','a',NULL,NULL,NULL,'q3','{"details": {"note": "\u03b5"}, "segments": [{"noise_multiplier": 8.0, "sample_rate": 0.02, "steps": 30}, {"noise_multiplier": 4.0, "sample_rate": 0.02, "steps": 50}]}');
INSERT INTO "entries" VALUES(4,'2026-11-24T20:40:30.548+00:00','steps_reserved','clicks','a','cece6de953969e1cd7962a388b782827',1,40,'q4','{"epsilon_after": 0.07290844664315209, "requested": 40, "run_epsilon": 0.07290844664315209}');
INSERT INTO "entries" VALUES(5,'2026-11-24T20:40:30.551+00:00','steps_settled','clicks','a','cece6de953969e1cd7962a388b782827',NULL,35,'q5','{}');
INSERT INTO "entries" VALUES(6,'2026-11-24T20:40:30.564+00:00','steps_reserved','clicks','a','fdbb462fb434e7c12c8b50c6f434aa35',36,10,'q6','{"epsilon_after": 0.09939898053780136, "requested": 10, "run_epsilon": 0.09939898053780136}');
INSERT INTO "entries" VALUES(7,'2026-11-24T20:40:30.566+00:00','model_released','clicks','a',NULL,45,NULL,'q7','{}');
INSERT INTO "entries" VALUES(8,'2026-11-24T20:40:30.578+00:00','budget_set','clicks',NULL,NULL,NULL,NULL,'q8','{"delta": 1e-05, "epsilon": 9.0, "reason": "more room"}');
INSERT INTO "entries" VALUES(9,'2026-11-24T20:40:30.581+00:00','run_closed','clicks','a',NULL,NULL,NULL,'q9','{"status": "finished"}');
INSERT INTO "entries" VALUES(10,'2026-11-24T20:40:30.582+00:00','run_opened','clicks','plain',NULL,NULL,NULL,'q10','{"details": {"non_private": true}, "segments": null}');
INSERT INTO "entries" VALUES(11,'2025-01-01T00:00:00.000+00:00','run_opened','clicks','old',NULL,NULL,NULL,NULL,'{"event": {"noise_multiplier": 4.0, "sample_rate": 0.02}, "planned_steps": 70, "details": {"non_private": false}}');
INSERT INTO "entries" VALUES(12,'2025-01-01T00:00:01.000+00:00','steps_reserved','clicks','old','0123456789abcdef0123456789abcdef',1,20,'q11','{"requested": 20, "epsilon_after": 1.0, "run_epsilon": 0.5}');
CREATE TABLE ledger_meta (
	"key" TEXT NOT NULL, 
	value TEXT NOT NULL, 
	PRIMARY KEY ("key")
);
INSERT INTO "ledger_meta" VALUES('schema_version','1');
CREATE TABLE runs (
	run_id TEXT NOT NULL, 
	dataset TEXT NOT NULL, 
	PRIMARY KEY (run_id), 
	FOREIGN KEY(dataset) REFERENCES datasets (name)
);
INSERT INTO "runs" VALUES('a','clicks');
INSERT INTO "runs" VALUES('plain','clicks');
INSERT INTO "runs" VALUES('old','clicks');
CREATE UNIQUE INDEX one_entry_of_a_kind_per_lease ON entries (kind, lease_id);
CREATE INDEX ix_entries_dataset ON entries (dataset);
CREATE TRIGGER datasets_no_update BEFORE UPDATE ON datasets BEGIN SELECT RAISE(ABORT, 'append-only'); END;
CREATE TRIGGER datasets_no_delete BEFORE DELETE ON datasets BEGIN SELECT RAISE(ABORT, 'append-only'); END;
CREATE TRIGGER runs_no_update BEFORE UPDATE ON runs BEGIN SELECT RAISE(ABORT, 'append-only'); END;
CREATE TRIGGER runs_no_delete BEFORE DELETE ON runs BEGIN SELECT RAISE(ABORT, 'append-only'); END;
CREATE TRIGGER entries_no_update BEFORE UPDATE ON entries BEGIN SELECT RAISE(ABORT, 'append-only'); END;
CREATE TRIGGER entries_no_delete BEFORE DELETE ON entries BEGIN SELECT RAISE(ABORT, 'append-only'); END;
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('entries',12);
COMMIT;
