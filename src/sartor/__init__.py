"""sartor: a differentiable MPC whose solutions and derivatives are right, and models tailored to it."""

from sartor.problem import Problem as Problem
from sartor.problem import Softening as Softening
from sartor.problem import rollout as rollout
from sartor.problem import total_cost as total_cost
from sartor.sensitivity import error_sensitivity as error_sensitivity
from sartor.sensitivity import regularity as regularity
from sartor.solution import RESULTS as RESULTS
from sartor.solution import Rows as Rows
from sartor.solution import Solution as Solution
from sartor.solution import SolveError as SolveError
from sartor.solution import guess as guess
from sartor.solution import shift as shift
from sartor.solve import solve as solve
from sartor.solve import violations as violations
from sartor.solvers.box_ddp import BoxDDP as BoxDDP
from sartor.solvers.sqp import SQP as SQP
