"""The paper as one graph: trainings -> figures and tables.

`snakemake -n` lists it all, and what is missing for it; config/*.yaml says what, and how large. A run is `softnce run`
on a notebook (see nbs/guides/clusters.ipynb). Its metrics.json appears last, so that it means done. The executed
notebook, its log and its checkpoints are neither outputs nor logs here: Snakemake deletes the ones and empties the
others. A run is made again when the code of its notebook changes, and only then.
"""
from softnce.runs import Plan, UsageError, check_partition, say_problems, wait_for_queue

if "targets" not in config:
    configfile: "config/paper.yaml"

plan = Plan(config)
problems = say_problems(plan, workflow)  # what keeps the runs that are asked for from starting, said with -n too
RUN = f"{plan.out}/{{experiment}}/{{id}}"


rule all:
    localrule: True
    default_target: True
    input: [plan.files(target) for target in plan.targets]


for target in plan.targets:  # `snakemake table1` makes what Table 1 needs
    rule:
        name: target
        localrule: True
        input: plan.files(target)


rule run:  # one training, or a notebook that does its own
    wildcard_constraints: experiment=plan.names(figures=False)
    output: update(f"{RUN}/metrics.json")  # never deleted by Snakemake: the runner knows what is finished
    log: f"{RUN}/job.txt"
    params: command=lambda w: plan.command(w.experiment, w.id), code=lambda w: plan.code_hash(w.experiment, w.id)
    resources:
        gpu=plan.resource("gpu", 0), nodes=1, runtime=plan.resource("runtime", 60), mem_mb=plan.resource("mem_mb", 4000)
    threads: plan.resource("threads", 1)
    message: "{params.command}"
    shell: "trap '' TERM USR1; {params.command} 2>&1 | tee -i {log:q}"


rule figure:  # a notebook that draws from runs
    wildcard_constraints: experiment=plan.names(figures=True)
    localrule: True
    input: lambda w: plan.inputs(w.experiment, w.id)
    output: f"{RUN}/metrics.json"  # deleted and drawn again when a run behind it is newer
    log: f"{RUN}/job.txt"
    params: command=lambda w: plan.command(w.experiment, w.id), code=lambda w: plan.code_hash(w.experiment, w.id)
    message: "{params.command}"
    shell: "{params.command} 2>&1 | tee -i {log:q}"


onstart:
    if problems and not workflow.execution_settings.keep_going:
        raise UsageError("nothing was started: " + problems[0])
    check_partition(workflow.resource_settings.default_resources)
    wait_for_queue()  # jobs that a killed Snakemake left behind
