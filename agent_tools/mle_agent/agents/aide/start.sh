#!/bin/bash
# Runs aideml, then its best script once more: its working folder holds the submission of the script
# that ran last, which need not be the best.
cd "$AGENT_DIR" || exit 1
timeout "$TIME_LIMIT_SECS" python3 -c 'from aide.run import run; run()' \
  data_dir=/home/data desc_file=/home/instructions.txt exp_name=exp \
  log_dir=/home/agent/logs workspace_dir=/home/agent/workspaces copy_data=false \
  generate_report=false agent.steps="$STEP_LIMIT" \
  agent.code.model="$MODEL" agent.feedback.model="$MODEL" report.model="$MODEL" "$@" \
  > /home/logs/aide.txt 2>&1
status=$?
logs=$(echo /home/agent/logs/*exp) workspace=$(echo /home/agent/workspaces/*exp)
cp "$logs"/journal.json "$logs"/config.yaml /home/logs/ 2>> /home/logs/aide.txt
cp "$logs"/best_solution.py /home/code/solution.py || exit "$status"
rm -f "$workspace/working/submission.csv"
cd "$workspace" && python3 /home/code/solution.py > /home/logs/best.txt 2>&1
if [ -f working/submission.csv ]; then cp working/submission.csv /home/submission/submission.csv; fi
/home/validate_submission.sh /home/submission/submission.csv > /home/logs/validation.txt
