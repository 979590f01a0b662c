"""sartor: a differentiable MPC whose solutions and derivatives are right, and models tailored to it."""

from sartor.kkt import LQ as LQ
from sartor.labels import Label as Label
from sartor.labels import action_gradient as action_gradient
from sartor.labels import action_sensitivity as action_sensitivity
from sartor.labels import label as label
from sartor.labels import regret_factor as regret_factor
from sartor.mpc import MPC as MPC
from sartor.mpc import Episode as Episode
from sartor.mpc import simulate as simulate
from sartor.problem import Problem as Problem
from sartor.problem import Softening as Softening
from sartor.problem import rollout as rollout
from sartor.problem import total_cost as total_cost
from sartor.riccati import lqr as lqr
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
